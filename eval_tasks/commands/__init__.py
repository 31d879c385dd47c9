"""The commands of `protogen`, a module each with `main(argv)`."""
