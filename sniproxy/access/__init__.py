"""Access control: rules, what a target reaches, the loop guard, and limits per client."""
