"""What users touch: the Python class LLM, the OpenAI API and the command line."""
