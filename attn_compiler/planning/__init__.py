"""Sites, policies, plans and schedules: values, no graph."""
