"""Who may go where, and how much each may take: rules, what a target reaches, loop guard, limits per client."""
