"""The training engine that pretraining and fine-tuning share."""
