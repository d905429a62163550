"""One run: stages through the store, from the settings to the verdict."""
