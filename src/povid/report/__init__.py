"""Tables, figures and dashboards made from run folders; nothing here imports torch."""
