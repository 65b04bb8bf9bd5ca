"""Five attributes of a photograph: how each is named, changed, measured, labelled."""
