"""What networks that were trained differently do differently: each module one question."""
