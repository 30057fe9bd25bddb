from .losses import corrupt, draw_timesteps, loss_weights, paella_loss

__all__ = ["corrupt", "draw_timesteps", "loss_weights", "paella_loss"]
