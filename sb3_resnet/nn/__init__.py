"""Networks: backbones, heads, what happens to images before them, and which stages train."""
