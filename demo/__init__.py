"""Small trained LoRA adapters of SmolLM2-135M-Instruct, and the scripts that made and check them."""
