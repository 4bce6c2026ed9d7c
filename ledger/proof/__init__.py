"""Does it add up? Each module asks the tables one question and names what differs."""
