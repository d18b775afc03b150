"""The whole life as steps that can be run again."""
