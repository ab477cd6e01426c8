"""What runs graphs: a session for each library, two graphs as one, and ``open``, the door to all of them."""
