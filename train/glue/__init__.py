"""A T-expert on any GLUE task, with its controls, scored on the dev set."""
