"""Tables, figures and dashboards, made from run folders and never typed."""
