"""Who learns and who answers: loading, policy, template, generation, adapters."""
