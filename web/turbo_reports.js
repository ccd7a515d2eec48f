// Shows the reports of Turbo Distill's nodes on the nodes: what was loaded, the schedule, warnings.
//
// A report arrives while its node runs (EVENT, from nodes/ui.py) and as the node's `ui` output,
// which core sends again where the node is cached and keeps in the history. From there it comes
// back after a reload. A widget of this file shows it, in both renderers; core's own progress texts
// vanish when the job ends. The widget is there only where there is something to show, and is not
// saved: the saved height of the node is the one without it.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

const EVENT = 'turbo_distill.report'
const NAME = 'turbo_report' // of the widget
const WARNING = 'Warning: '
const ENDED = 'completed,failed,cancelled' // jobs
const MARGIN = 10 // around a widget, on both sides
const MAX_HEIGHT = 240 // of the text; more of it scrolls

const STYLE = `
.turbo-report { box-sizing: border-box; max-height: ${MAX_HEIGHT}px; overflow-y: auto;
  padding: 6px 8px; border-radius: 6px; background: var(--comfy-input-bg); color: var(--input-text);
  font: 12px/1.4 sans-serif; overflow-wrap: anywhere; user-select: text; cursor: text }
.turbo-report div { white-space: pre-wrap; min-height: 1em }
.turbo-report .warning { margin-top: 4px; padding: 4px 8px; border-left: 3px solid #f5a623;
  background: rgb(245 166 35 / 15%) }`

const isOurs = (node) => node?.comfyClass?.startsWith('TurboDistill')
const root = () => app.rootGraph ?? app.graph
const graphs = () => [root(), ...(root().subgraphs?.values() ?? [])]

/** The node of an execution id such as "7", or "5:7" for node 7 in the sub-graph node 5. */
function nodeAt(id) {
  const path = String(id).split(':')
  const last = path.pop()
  const graph = path.reduce((graph, id) => graph?.getNodeById(id)?.subgraph, root())
  return graph?.getNodeById(last)
}

/** Shows the `ui` output of a node that reports; an empty report takes the last one away. */
function showOutput(node, output) {
  if (!isOurs(node) || !output?.report) return
  const report = [...new Set(output.report)].join('\n') // a list of inputs gives one for each
  const note = report === node.turboReport?.report ? node.turboReport.note : '' // sent again
  show(node, { report, note })
}

/** The same for all nodes, from the front end's outputs by "id" or "sub-graph:id". */
function showOutputs(outputs) {
  for (const graph of graphs())
    for (const node of graph.nodes)
      showOutput(node, outputs[graph === root() ? node.id : `${graph.id}:${node.id}`])
}

function show(node, shown) {
  const found = node.widgets?.find((widget) => widget.name === NAME)
  if (!shown.report && !shown.note) return removeWidget(node, found)
  node.turboReport = shown
  const widget = found ?? addWidget(node)
  const before = widget.reportHeight
  const lines = `${shown.report}\n${shown.note}`.trim().split('\n')
  widget.element.replaceChildren(
    ...lines.map((line) => {
      const div = document.createElement('div')
      div.textContent = line
      if (line.startsWith(WARNING)) div.className = 'warning'
      return div
    })
  )
  widget.reportHeight = heightOf(widget.element, node.size[0] - 2 * MARGIN) + 2 * MARGIN
  node.setSize([node.size[0], node.size[1] + widget.reportHeight - before])
  node.setDirtyCanvas(true, true)
}

function addWidget(node) {
  const element = document.createElement('div')
  element.className = 'turbo-report'
  const height = () => widget.reportHeight
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, // not an input of the prompt
    hideInPanel: true, // one element cannot be in two places
    margin: MARGIN,
    getMinHeight: height,
    getMaxHeight: height
  })
  widget.serialize = false // not in the workflow
  widget.reportHeight = 0
  return widget
}

function removeWidget(node, widget) {
  delete node.turboReport
  if (!widget) return
  node.removeWidget(widget)
  node.setSize([node.size[0], node.size[1] - widget.reportHeight])
}

/** How high an element is at this width, in pixels at zoom 1. */
function heightOf(element, width) {
  const copy = element.cloneNode(true)
  copy.style.cssText = `position: absolute; visibility: hidden; height: auto; width: ${width}px`
  document.body.append(copy)
  const height = copy.offsetHeight
  copy.remove()
  return height
}

/** The outputs of the last job of the open workflow that are not shown already. */
async function showHistory() {
  const workflow = root().id
  const answer = await api.fetchApi(`/jobs?limit=1&workflow_id=${workflow}&status=${ENDED}`)
  const [job] = answer.ok ? (await answer.json()).jobs : []
  if (!job) return
  const { outputs, meta } = (await (await api.fetchApi(`/history/${job.id}`)).json())[job.id] ?? {}
  if (root().id !== workflow) return // another one was opened meanwhile
  for (const [id, output] of Object.entries(outputs ?? {})) {
    const node = nodeAt(meta?.[id]?.display_node ?? id)
    if (!node?.turboReport) showOutput(node, output)
  }
}

app.registerExtension({
  name: 'TurboDistill.Reports',

  setup() {
    document.head.append(Object.assign(document.createElement('style'), { textContent: STYLE }))
    api.addEventListener(EVENT, ({ detail }) => {
      const node = nodeAt(detail.node)
      if (!isOurs(node)) return
      if (!detail.note) return show(node, { report: detail.report, note: '' })
      const { report = '', note = '' } = node.turboReport ?? {} // told after the node is done
      show(node, { report, note: `${note}\n${detail.note}` })
    })
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith('TurboDistill')) return
    const { onExecuted, onSerialize } = nodeType.prototype
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output)
      showOutput(this, output)
    }
    nodeType.prototype.onSerialize = function (saved) {
      onSerialize?.call(this, saved)
      const widget = this.widgets?.find((widget) => widget.name === NAME)
      if (widget) saved.size[1] -= widget.reportHeight
    }
  },

  // another workflow, or a job of the queue, was opened
  onNodeOutputsUpdated: showOutputs,

  async afterConfigureGraph() {
    showOutputs(app.nodeOutputs) // after undo they are still there
    await showHistory()
  }
})
