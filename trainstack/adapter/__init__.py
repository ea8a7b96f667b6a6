"""LoRA: small matrices beside the layers of a model that stays as it is."""
