"""Training many users' adapters at once: our stack against one by one with peft, and against TRL's own trainer."""
