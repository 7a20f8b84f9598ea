"""Who goes next, and the plan of each pass. No torch, no Ray."""
