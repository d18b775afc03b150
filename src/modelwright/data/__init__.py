"""What is learned from: reading, cleaning, removing duplicates, redaction, conversations, packing."""
