"""Files of models, ours and others', and the names timm learns."""
