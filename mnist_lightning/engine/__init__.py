"""What makes textbook Lightning code fast, exact and safe. It knows no digit; its README says what it promises."""
