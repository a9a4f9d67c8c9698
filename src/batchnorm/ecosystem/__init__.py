"""Other libraries' tools that look a layer up by its exact class; docs/ecosystem.md lists them."""
