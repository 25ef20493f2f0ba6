"""The folding of batch normalisation into other layers, for inference (`bnlab.norm.fold`)."""
