"""What ProtoGen is compared with."""
