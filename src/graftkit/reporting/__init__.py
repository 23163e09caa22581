"""Pictures and the HTML report; needs the extra `report` (matplotlib, jinja2)."""
