"""One thin module per `cacr` command: it parses arguments, calls the library, prints. Each has `main(argv) -> int`."""
