"""torch.fx in, torch.fx out."""
