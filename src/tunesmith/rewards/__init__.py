"""What a reply is worth: checks that a computer can make, a user's function, a reward model."""
