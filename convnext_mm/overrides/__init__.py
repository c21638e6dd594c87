"""A module a toolbox: importing it puts our constructor in the place of the toolbox's own."""
