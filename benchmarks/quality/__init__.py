"""What rewriting costs in quality: models trained here from scratch, and what becomes of them."""
