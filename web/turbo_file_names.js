// Fills %date:yyyy-MM-dd% and %Node.widget% into filename_prefix. The front end does this for core's
// own save nodes only (Comfy.SaveImageExtraOutput).
import { app } from '../../scripts/app.js'

const NODES = ['TurboDistillSaveImage', 'TurboDistillImages']

app.registerExtension({
  name: 'TurboDistill.FileNames',
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return
    const replace = window.comfyAPI?.utils?.applyTextReplacements
    const widget = node.widgets?.find((widget) => widget.name === 'filename_prefix')
    if (replace && widget) widget.serializeValue = () => replace(app, widget.value)
  }
})
