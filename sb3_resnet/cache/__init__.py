"""The frozen part of the network as a fast function, and its results kept."""
