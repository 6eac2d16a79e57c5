"""What the database holds, how it grows and how it fares: in words, as JSON, and as a picture."""
