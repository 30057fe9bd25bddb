from .losses import corrupt, loss_weights, paella_loss

__all__ = ["corrupt", "loss_weights", "paella_loss"]
