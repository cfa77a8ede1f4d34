"""Loading models, and the map of the places in them where methods attach."""
