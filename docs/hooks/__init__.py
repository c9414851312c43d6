"""What the site adds to MkDocs while it is built; `mkdocs.yml` names these files."""
