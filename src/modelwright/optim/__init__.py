"""Update rules and their schedules."""
