"""The demo model: its pictures, its questions, the script that trains it, and its export."""
