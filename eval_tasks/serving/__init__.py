"""A trained model behind the HTTP API of OpenAI."""
