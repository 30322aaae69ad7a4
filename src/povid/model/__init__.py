"""The models that learn and answer: loading, policy, template, generation, adapters."""
