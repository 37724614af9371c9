"""`python -m study`: see driver.py."""
from study.driver import main

if __name__ == "__main__":
    main()
