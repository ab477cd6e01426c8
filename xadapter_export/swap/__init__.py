"""Another bank put into a finished bundle."""
