"""From files to batches: sources, formats, templates, masks, packing, mixing, collating."""
