"""What attackers are after: each goal is a task and the numbers that tell whether it was reached; any attack may pursue it."""
