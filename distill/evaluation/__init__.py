"""`turbo-distill eval`: a LoRA measured against its teacher on the same noise."""
