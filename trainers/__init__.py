"""Learning: fitting proto-tokens to texts, and training the encoder that predicts them."""
