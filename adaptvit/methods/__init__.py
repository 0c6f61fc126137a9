"""One file per method: config, model, decision functions, own loss."""
