"""The agent's base exception."""


class AgentError(Exception):
    """Something a person has to put right; the message names the fix."""
