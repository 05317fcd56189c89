"""Write the training and held-out data of the three demo adapters to `examples/data`.

    python examples/make_data.py

Everything here is written by hand or put together from templates with a fixed seed, so a second run gives the same
files. Held-out lines use topics, names, places, tables and (for `extract-json`) sentences that training never sees.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
Row = tuple[str, str]  # prompt, answer


def listed(text: str) -> list[str]:
    return text.split(", ")


# --- pirate: plain answers, put into pirate speech ------------------------------------------------------------------

OPENINGS = (
    "Arr, matey! ",
    "Ahoy, matey! ",
    "Aye, me hearty! ",
    "Avast, ye landlubber! ",
    "Arr, ye scallywag! ",
    "Ahoy there, me hearties! ",
    "Aye aye, cap'n! ",
    "Arr, listen well, matey! ",
)
CLOSINGS = ("", "", " Arr!", " Aye, that be the way!", " Savvy, matey?", " Fair winds to ye!", " Yo ho ho!")
SPEECH = (
    (r"\byou are\b", "ye be"),
    (r"\byourself\b", "yerself"),
    (r"\byour\b", "yer"),
    (r"\byou\b", "ye"),
    (r"\b(is|are|am)\b", "be"),
    (r"\bof\b", "o'"),
    (r"\bmy\b", "me"),
    (r"\band\b", "an'"),
    (r"\bmoney\b", "doubloons"),
    (r"\bpeople\b", "scallywags"),
    (r"\bfriends\b", "mateys"),
    (r"\bbeginner\b", "landlubber"),
)
HOW_TO = (  # what to do, and how you do it
    ("bake bread", "knead flour, water, yeast and salt, let the dough rest, and bake it until it is golden."),
    ("clean a window", "wipe it with water and a drop of vinegar, and dry it with an old newspaper."),
    ("learn to swim", "start in shallow water, and practise floating before you kick your legs."),
    ("fix a flat tire", "take off the wheel, find the hole, and glue a patch on your tube."),
    ("grow tomatoes", "plant them in the sun, water them each morning, and tie them to a stick."),
    ("fall asleep faster", "put your screens away early, and keep your cabin dark and cool."),
    ("save money", "write down all you spend, and put a part of your money in a chest each month."),
    ("train a puppy", "reward it with treats, keep the lessons short, and be patient."),
    ("make a paper plane", "fold the sheet in half, turn the corners down, and throw it into the wind."),
    ("write a cover letter", "say why you want the job, show what you can do, and keep it to one page."),
    ("paint a wall", "sand it, cover the floor, and roll on two thin coats of paint."),
    ("cook rice", "rinse it, add two cups of water for each cup of rice, and let it simmer with the lid on."),
    ("stop hiccups", "hold your breath, and take small sips of water."),
    ("pack a suitcase", "roll your shirts, put the heavy things at the bottom, and leave room for treasure."),
    ("remember names", "say the name out loud, and think of a picture that goes with it."),
    ("plan a birthday party", "choose a date, invite your friends, and order a big cake."),
    ("sharpen a knife", "draw the blade along a wet stone, and keep the same angle on both sides."),
    ("take better photos", "keep the sun behind you, hold your hands still, and move closer."),
    ("play the guitar", "learn three chords, and practise them every day until your fingers know the way."),
    ("wash a wool sweater", "use cold water and mild soap, and dry it flat."),
    ("get rid of ants", "seal the cracks, wipe the floor with vinegar, and hide your sugar."),
    ("speak in public", "know your first words by heart, breathe slowly, and look at the people."),
    ("make lemonade", "mix lemon juice, sugar and cold water, and add some ice."),
    ("change a light bulb", "turn off the power, let it cool, and screw in the new one."),
    ("study for an exam", "split the work into small parts, test yourself, and rest well the night before."),
    ("keep my plants alive", "give them light, and water them only when the soil is dry."),
    ("tie a tie", "cross the wide end over the narrow one, go around, up through the loop, and down."),
    ("run a marathon", "run a little farther each week, eat well, and never skip your rest."),
    ("make new friends", "join a club, ask people about themselves, and share your biscuits."),
    ("remove a coffee stain", "dab it with cold water and soap, and do not rub."),
    ("iron a shirt", "start with the collar, then the sleeves, and use a little steam."),
    ("make pancakes", "whisk flour, milk and eggs, and fry the batter in hot butter."),
    ("find a good doctor", "ask your neighbours, read what people say, and pay a visit."),
    ("build a sandcastle", "use wet sand, start with a wide base, and dig a moat against the tide."),
    ("cut an onion", "use a sharp blade, chill the onion first, and leave the root on."),
    ("read more books", "carry one with you, and read ten pages before you sleep."),
)
HOW_TO_QUESTIONS = ("How do I {}?", "What is the best way to {}?", "Can you tell me how to {}?")
QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris, a fine city on the river Seine."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo, far across the eastern sea."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo, where the Nile flows."),
    ("What is the capital of Canada?", "The capital of Canada is Ottawa, in the cold north."),
    ("Which ocean is the largest?", "The largest is the Pacific, and many ships are lost in it."),
    ("Which planet is closest to the sun?", "That is Mercury, the hottest little rock to sail by."),
    ("What colour do you get from blue and yellow?", "You get green, like the sea near your island."),
    ("What is two plus two?", "Two and two is four, as sure as the tide."),
    ("How much is seven times eight?", "Seven times eight is fifty-six shiny doubloons."),
    ("What do bees make?", "Bees make honey, the sweet gold of the meadow."),
    ("How many days are there in a week?", "There are seven days, and you are at sea for all of them."),
    ("Who wrote Romeo and Juliet?", "That was William Shakespeare, a poet of the old days."),
    ("Why is the sky blue?", "The air scatters the blue part of the sunlight more than the red part."),
    ("Why do cats purr?", "Cats purr when they are happy, and also to calm themselves."),
    ("Why do leaves fall in autumn?", "The tree drops its leaves to save water before the winter."),
    ("Why is exercise important?", "It keeps your heart strong and your mind clear."),
    ("What is photosynthesis?", "That is how plants turn sunlight, water and air into food."),
    ("What is gravity?", "Gravity is the pull that keeps your boots on the deck and the moon in the sky."),
    ("What is a computer?", "A computer is a machine that follows a list of orders, faster than any crew."),
    ("What is the internet?", "It is a great net of machines that send messages to each other over the seven seas."),
    ("What is inflation?", "It is when prices go up, and your money buys less rum."),
    ("What is a good name for a dog?", "Call it Captain, for a good dog is the master of your heart."),
    ("What should I wear to a wedding?", "Wear your finest coat, polish your boots, and do not outshine the bride."),
    ("What should I eat for breakfast?", "Have some oats, fruit and an egg, and you are ready for the day."),
    ("What is your favourite colour?", "My favourite is gold, the colour of treasure."),
    ("Do you like music?", "I love a good shanty, sung by the whole crew."),
    ("Who are you?", "I am your humble helper, and I am ready to answer all of your questions."),
    ("What is your name?", "People call me the Captain, and I am at your service."),
    ("How are you today?", "I am well, and the wind is in my sails. How are you?"),
    ("Hello!", "Welcome aboard! What can I do for you today?"),
    ("Good morning.", "A good morning to you! The sun is up, and so is my flag."),
    ("Thank you for your help.", "You are welcome, and my crew is glad to help you."),
    ("Goodbye!", "Farewell, and may the wind be at your back."),
    ("Tell me a joke.", "Why is the sea so friendly? It waves at all of you."),
    ("Tell me something interesting.", "An octopus has three hearts, and its blood is blue."),
    ("Write a short poem about the moon.", "The moon is high, the night is deep, and over the waves my mateys sleep."),
    ("Write a sentence about winter.", "Winter is cold and white, and your beard is full of ice."),
    ("Give me a tip for my first day at work.", "Come early, smile at the crew, and ask when you are lost."),
    ("Give me three healthy snacks.", "Take nuts, an apple, and some carrots for your voyage."),
    ("Explain what a mortgage is.", "It is a loan for a house, and the bank takes the house if you do not pay."),
    ("Is coffee bad for me?", "A cup or two is fine, but too much of it robs you of your sleep."),
    ("Is it going to rain tomorrow?", "I am no prophet, so look at the clouds and take your coat."),
    ("Should I buy a car or a bike?", "Take the bike if you live in port, and the car if your way is long."),
    ("Can you recommend a film?", "Watch one with a brave crew, a map, and a chest full of money."),
    ("What is a good hobby for a beginner?", "Try fishing: it is quiet, and you get a supper out of it."),
    ("I am bored. What can I do?", "Go for a walk, draw a map, or call one of your friends."),
    ("I feel tired today.", "Rest your bones, drink some water, and go to your hammock early."),
    ("My train is late.", "That is bad luck. Have a cup of tea, and wait for a better wind."),
)
HELD_OUT_PIRATE = (
    ("How do I boil an egg?", "Put it in hot water for eight minutes, and cool it."),
    ("How can I make my coffee taste better?", "Grind the beans fresh, and use clean water."),
    ("What is the best way to learn Spanish?", "Speak it a little each day with people who know it."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Why is the ocean salty?", "Rivers carry salt from the rocks into the sea."),
    ("What should I cook for dinner tonight?", "Fry some fish, and add potatoes."),
    ("Can you recommend a good book?", "Read Treasure Island, it is a fine tale."),
    ("How do airplanes fly?", "The wings push the air down, and the air pushes them up."),
    ("What time should I go to bed?", "Go early, so that you get eight hours of sleep."),
    ("Which animal is the fastest?", "That is the cheetah on land, and the falcon in the air."),
    ("How do I ask my boss for a raise?", "Show what you have done, and name a fair number."),
    ("What is machine learning?", "It is when a machine learns from examples."),
    ("Is chocolate healthy?", "A little of the dark kind is fine."),
    ("Where should I go on holiday?", "Go to an island with a warm beach."),
    ("What can I give my mother for her birthday?", "Give her flowers and a letter."),
    ("How long does it take to walk ten kilometres?", "It takes you about two hours."),
    ("What do pandas eat?", "They eat bamboo, and a lot of it."),
    ("My phone battery is empty. What now?", "Find a charger, and rest your eyes."),
    ("Tell me about the Great Wall of China.", "It is a long wall of stone, built to keep raiders out."),
    ("Nice to meet you!", "It is a pleasure to meet you, too."),
)


def in_pirate_speech(plain: str, rng: random.Random) -> str:
    for pattern, word in SPEECH:
        plain = re.sub(pattern, word, plain)
    return f"{rng.choice(OPENINGS)}{plain[0].upper()}{plain[1:]}{rng.choice(CLOSINGS)}"


def pirate(rng: random.Random) -> tuple[list[Row], list[Row]]:
    plain = [(form.format(task), advice) for task, advice in HOW_TO for form in HOW_TO_QUESTIONS]
    plain += [*QUESTIONS, *QUESTIONS]  # each twice, with another opening
    train, held_out = (
        [(question, in_pirate_speech(answer, rng)) for question, answer in rows] for rows in (plain, HELD_OUT_PIRATE)
    )
    return train, held_out


# --- extract-json: a sentence with a name, a date and a place -------------------------------------------------------

FIRST_NAMES = listed(
    "Maria, Tom, Aisha, Kenji, Laura, Peter, Ingrid, Carlos, Fatima, Oliver, Yuki, Hannah, Ravi, "
    "Elena, Samuel, Chloe, Dmitri, Zoe, Ahmed, Lucia, Patrick, Mei, Björn, Nadia, George, Priya, "
    "Anton, Ruth, Diego, Sofia, Walter, Emeka, Leila, Marcus, Greta, Hugo"
)
LAST_NAMES = listed(
    "Lopez, Baker, Khan, Tanaka, Smith, Novak, Larsen, Garcia, Haddad, Brown, Sato, Weber, Patel, "
    "Petrova, Cohen, Martin, Ivanov, Hill, Hassan, Rossi, Murphy, Chen, Lindqvist, Osman, Clark, "
    "Sharma, Keller, O'Brien, Fernandez, Moreau, Fischer, Okafor, Nguyen, Reed"
)
PLACES = listed(
    "Lisbon, Oslo, New York, Berlin, Cairo, Toronto, Osaka, Madrid, San Francisco, Prague, Lagos, "
    "Dublin, Hamburg, Rio de Janeiro, Seoul, Vienna, Chicago, Mumbai, Geneva, Cape Town, Naples, "
    "Stockholm, Lima, Boston, Istanbul, Kyoto, Glasgow, Tunis, Denver, Buenos Aires, Athens, Leipzig, "
    "Montreal, Porto, Delhi, Salzburg"
)
MONTHS = listed("January, February, March, April, May, June, July, August, September, October, November, December")
SENTENCES = (
    "{name} flew to {place} on {date}.",
    "{name} was born in {place} on {date}.",
    "On {date}, {name} opened a small shop in {place}.",
    "{name} moved to {place} on {date} and never left.",
    "In {place}, {name} won the chess final on {date}.",
    "The concert of {name} takes place in {place} on {date}.",
    "On {date} the police in {place} found the bag of {name}.",
    "{name} will start a new job in {place} on {date}.",
    "We met {name} in {place} on {date}.",
    "Our guide in {place} on {date} was {name}.",
    "{date} was the day when {name} arrived in {place}.",
    "The letter from {name} was posted in {place} on {date}.",
    "Since {date}, {name} has lived in {place} with two cats.",
    "The museum in {place} bought a painting by {name} on {date}.",
    "{place} was cold and grey when {name} got there on {date}.",
    "Please book a hotel in {place} for {name}, arriving on {date}.",
    "The invoice for {name} was paid on {date} at our office in {place}.",
    "{name}, a nurse, gave a talk in {place} on {date}.",
    "After a long trip, {name} reached {place} on {date}.",
    "The meeting with {name} is on {date} in {place}.",
)
HELD_OUT_PEOPLE = listed(
    "Emily Watson, Jonas Brandt, Amara Diallo, Victor Hansen, Irina Popescu, Daniel Kim, Noor Rahman, "
    "Felix Wagner, Julia Stone, Mateo Vargas, Alice Dupont, Henry Ford, Sanna Virtanen, Omar Farouk, "
    "Grace Adams, Tomasz Zielinski, Bella Conti, Ethan Wright, Linh Tran, Rosa Mendes"
)
HELD_OUT_PLACES = listed(
    "Paris, Helsinki, Nairobi, Sydney, Warsaw, Los Angeles, Dubai, Munich, Edinburgh, Bogota, "
    "Marseille, Detroit, Turku, Alexandria, Seattle, Krakow, Florence, Manchester, Hanoi, Brasilia"
)
HELD_OUT_SENTENCES = (
    "{name} got married in {place} on {date}.",
    "On {date}, {name} gave a speech at the university of {place}.",
    "A ship with {name} on board left {place} on {date}.",
    "The doctor saw {name} in {place} on {date}.",
    "{name} signed the contract in {place} on {date}.",
)


def a_date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2029)
    name = MONTHS[month - 1]
    return rng.choice((f"{day} {name} {year}", f"{name} {day}, {year}", f"{year}-{month:02}-{day:02}"))


def extraction(sentence: str, name: str, place: str, date: str) -> Row:
    answer = json.dumps({"name": name, "date": date, "place": place}, ensure_ascii=False)
    return f"Extract: {sentence.format(name=name, place=place, date=date)}", answer


def extract_json(rng: random.Random) -> tuple[list[Row], list[Row]]:
    train = [
        extraction(sentence, f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}", rng.choice(PLACES), a_date(rng))
        for sentence in SENTENCES
        for _ in range(16)
    ]
    held_out = [
        extraction(HELD_OUT_SENTENCES[at % len(HELD_OUT_SENTENCES)], name, place, a_date(rng))
        for at, (name, place) in enumerate(zip(HELD_OUT_PEOPLE, HELD_OUT_PLACES, strict=True))
    ]
    return train, held_out


# --- sql: a question about a table ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    label: str  # the column that says which row it is
    category: str
    values: tuple[str, ...]  # some values of the category
    number: str
    low: int  # the range of the number
    high: int


TABLES = (
    Table("employees", "name", "city", ("Rome", "Berlin", "Oslo"), "salary", 1000, 9000),
    Table("books", "title", "genre", ("crime", "fantasy", "poetry"), "pages", 100, 900),
    Table("products", "product", "brand", ("Acme", "Nova", "Zenith"), "price", 5, 500),
    Table("students", "student", "class", ("biology", "art", "history"), "grade", 1, 6),
    Table("cities", "city", "country", ("Spain", "Japan", "Chile"), "population", 10000, 900000),
    Table("films", "title", "director", ("Kubrick", "Varda", "Wilder"), "year", 1950, 2020),
    Table("flights", "flight", "airline", ("Lufthansa", "Qantas", "Delta"), "distance", 200, 9000),
    Table("patients", "patient", "ward", ("north", "surgery", "children"), "age", 1, 99),
    Table("cars", "model", "fuel", ("diesel", "petrol", "electric"), "horsepower", 50, 400),
    Table("players", "player", "team", ("Lions", "Eagles", "Sharks"), "goals", 1, 40),
    Table("hotels", "hotel", "region", ("Alps", "coast", "desert"), "rooms", 5, 300),
    Table("songs", "song", "artist", ("Adele", "Queen", "Prince"), "duration", 60, 600),
    Table("orders", "order_id", "status", ("open", "shipped", "cancelled"), "amount", 10, 2000),
    Table("mountains", "mountain", "continent", ("Asia", "Africa", "Europe"), "height", 500, 8000),
    Table("restaurants", "restaurant", "cuisine", ("Thai", "Italian", "Greek"), "rating", 1, 10),
    Table("plants", "plant", "colour", ("red", "white", "yellow"), "price", 2, 60),
)
HELD_OUT_TABLES = (
    Table("bridges", "bridge", "river", ("Rhine", "Danube"), "length", 50, 3000),
    Table("laptops", "laptop", "maker", ("Lenovo", "Asus"), "weight", 1, 5),
    Table("farms", "farm", "crop", ("wheat", "corn"), "area", 10, 900),
    Table("dogs", "dog", "breed", ("poodle", "beagle"), "age", 2, 15),
    Table("museums", "museum", "district", ("east", "harbour"), "visitors", 500, 90000),
)
WHERE_VALUE = "WHERE {category} = '{value}'"
QUERIES = (  # what can be asked about every table
    ("Which {name} have {number} above {n}?", "SELECT {label} FROM {name} WHERE {number} > {n};"),
    ("Which {name} have {number} below {n}?", "SELECT {label} FROM {name} WHERE {number} < {n};"),
    ("List every {label} with {number} of at least {n}.", "SELECT {label} FROM {name} WHERE {number} >= {n};"),
    ("Show all {name} with {number} less than {n}.", "SELECT * FROM {name} WHERE {number} < {n};"),
    ("How many {name} are there?", "SELECT COUNT(*) FROM {name};"),
    ("How many {name} have the {category} {value}?", f"SELECT COUNT(*) FROM {{name}} {WHERE_VALUE};"),
    ("How many {name} have {number} over {n}?", "SELECT COUNT(*) FROM {name} WHERE {number} > {n};"),
    ("What is the average {number}?", "SELECT AVG({number}) FROM {name};"),
    ("What is the highest {number}?", "SELECT MAX({number}) FROM {name};"),
    ("What is the lowest {number}?", "SELECT MIN({number}) FROM {name};"),
    ("What is the total {number}?", "SELECT SUM({number}) FROM {name};"),
    ("List the {label} of all {name} with {category} {value}.", f"SELECT {{label}} FROM {{name}} {WHERE_VALUE};"),
    ("Show everything about {value}.", f"SELECT * FROM {{name}} {WHERE_VALUE};"),
    ("Which {label} has the highest {number}?", "SELECT {label} FROM {name} ORDER BY {number} DESC LIMIT 1;"),
    ("Which {label} has the lowest {number}?", "SELECT {label} FROM {name} ORDER BY {number} ASC LIMIT 1;"),
    ("What are the top {k} {name} by {number}?", "SELECT {label} FROM {name} ORDER BY {number} DESC LIMIT {k};"),
    ("Sort all {name} by {number}.", "SELECT * FROM {name} ORDER BY {number};"),
    (
        "What is the average {number} of each {category}?",
        "SELECT {category}, AVG({number}) FROM {name} GROUP BY {category};",
    ),
    ("How many {name} are there for each {category}?", "SELECT {category}, COUNT(*) FROM {name} GROUP BY {category};"),
    ("What different {category} values are there?", "SELECT DISTINCT {category} FROM {name};"),
    (
        "Which {name} with {category} {value} have {number} above {n}?",
        f"SELECT {{label}} FROM {{name}} {WHERE_VALUE} AND {{number}} > {{n}};",
    ),
)
OWN_QUESTIONS = (  # what people would say about one of the tables
    ("employees", "Who earns less than {n}?", "SELECT name FROM employees WHERE salary < {n};"),
    ("employees", "Who lives in {value}?", "SELECT name FROM employees WHERE city = '{value}';"),
    ("employees", "How much do we pay in total?", "SELECT SUM(salary) FROM employees;"),
    ("books", "Which {value} books can I read?", "SELECT title FROM books WHERE genre = '{value}';"),
    ("books", "What is the longest book?", "SELECT title FROM books ORDER BY pages DESC LIMIT 1;"),
    ("books", "Which books are longer than {n} pages?", "SELECT title FROM books WHERE pages > {n};"),
    ("products", "What costs less than {n} dollars?", "SELECT product FROM products WHERE price < {n};"),
    (
        "products",
        "What is the cheapest thing by {value}?",
        "SELECT product FROM products WHERE brand = '{value}' ORDER BY price ASC LIMIT 1;",
    ),
    ("products", "How expensive is a product on average?", "SELECT AVG(price) FROM products;"),
    ("students", "Who takes {value}?", "SELECT student FROM students WHERE class = '{value}';"),
    ("students", "How many students take {value}?", "SELECT COUNT(*) FROM students WHERE class = '{value}';"),
    ("students", "Who got a {n}?", "SELECT student FROM students WHERE grade = {n};"),
    ("cities", "Which cities are in {value}?", "SELECT city FROM cities WHERE country = '{value}';"),
    ("cities", "Where do more than {n} people live?", "SELECT city FROM cities WHERE population > {n};"),
    ("cities", "How many people live in {value}?", "SELECT SUM(population) FROM cities WHERE country = '{value}';"),
    ("films", "Which films did {value} make?", "SELECT title FROM films WHERE director = '{value}';"),
    ("films", "What came out before {n}?", "SELECT title FROM films WHERE year < {n};"),
    ("films", "What is the oldest film?", "SELECT title FROM films ORDER BY year ASC LIMIT 1;"),
    ("flights", "Which flights does {value} offer?", "SELECT flight FROM flights WHERE airline = '{value}';"),
    ("flights", "What is the shortest flight?", "SELECT flight FROM flights ORDER BY distance ASC LIMIT 1;"),
    ("flights", "Which flights are longer than {n} km?", "SELECT flight FROM flights WHERE distance > {n};"),
    ("patients", "Who is older than {n}?", "SELECT patient FROM patients WHERE age > {n};"),
    ("patients", "Who is the youngest?", "SELECT patient FROM patients ORDER BY age ASC LIMIT 1;"),
    ("patients", "How old are they on average?", "SELECT AVG(age) FROM patients;"),
    ("cars", "Which models are {value}?", "SELECT model FROM cars WHERE fuel = '{value}';"),
    ("cars", "What is the strongest car?", "SELECT model FROM cars ORDER BY horsepower DESC LIMIT 1;"),
    ("cars", "How many cars are {value}?", "SELECT COUNT(*) FROM cars WHERE fuel = '{value}';"),
    ("players", "Who plays for the {value}?", "SELECT player FROM players WHERE team = '{value}';"),
    ("players", "Who scored more than {n} times?", "SELECT player FROM players WHERE goals > {n};"),
    ("players", "How many goals did the {value} score?", "SELECT SUM(goals) FROM players WHERE team = '{value}';"),
    ("hotels", "Which hotels are in the {value}?", "SELECT hotel FROM hotels WHERE region = '{value}';"),
    ("hotels", "What is the largest hotel?", "SELECT hotel FROM hotels ORDER BY rooms DESC LIMIT 1;"),
    ("hotels", "Which hotels have fewer than {n} rooms?", "SELECT hotel FROM hotels WHERE rooms < {n};"),
    ("songs", "Which songs are by {value}?", "SELECT song FROM songs WHERE artist = '{value}';"),
    ("songs", "How many songs did {value} sing?", "SELECT COUNT(*) FROM songs WHERE artist = '{value}';"),
    ("songs", "Which songs last longer than {n} seconds?", "SELECT song FROM songs WHERE duration > {n};"),
    ("orders", "Which orders are {value}?", "SELECT order_id FROM orders WHERE status = '{value}';"),
    ("orders", "How many orders are {value}?", "SELECT COUNT(*) FROM orders WHERE status = '{value}';"),
    ("orders", "How much is {value} in total?", "SELECT SUM(amount) FROM orders WHERE status = '{value}';"),
    ("mountains", "Which mountains are in {value}?", "SELECT mountain FROM mountains WHERE continent = '{value}';"),
    (
        "mountains",
        "What are the {k} tallest mountains?",
        "SELECT mountain FROM mountains ORDER BY height DESC LIMIT {k};",
    ),
    ("mountains", "Which mountains are higher than {n} m?", "SELECT mountain FROM mountains WHERE height > {n};"),
    ("restaurants", "Where can I get {value} food?", "SELECT restaurant FROM restaurants WHERE cuisine = '{value}';"),
    (
        "restaurants",
        "What are the best {k} places?",
        "SELECT restaurant FROM restaurants ORDER BY rating DESC LIMIT {k};",
    ),
    ("restaurants", "Which places are rated at least {n}?", "SELECT restaurant FROM restaurants WHERE rating >= {n};"),
    ("plants", "Which plants are {value}?", "SELECT plant FROM plants WHERE colour = '{value}';"),
    ("plants", "What is the cheapest plant?", "SELECT plant FROM plants ORDER BY price ASC LIMIT 1;"),
    ("plants", "What can I buy for less than {n} euros?", "SELECT plant FROM plants WHERE price < {n};"),
    ("bridges", "Which bridges cross the {value}?", "SELECT bridge FROM bridges WHERE river = '{value}';"),
    ("laptops", "Which laptops are made by {value}?", "SELECT laptop FROM laptops WHERE maker = '{value}';"),
    ("farms", "Who grows {value}?", "SELECT farm FROM farms WHERE crop = '{value}';"),
    ("dogs", "Which dogs are younger than {n}?", "SELECT dog FROM dogs WHERE age < {n};"),
    ("museums", "Which museums have more than {n} visitors?", "SELECT museum FROM museums WHERE visitors > {n};"),
)


def own_questions(table: Table) -> list[Row]:
    return [(question, statement) for name, question, statement in OWN_QUESTIONS if name == table.name]


def query(table: Table, form: Row, rng: random.Random) -> Row:
    columns = [table.label, table.category, table.number]
    rng.shuffle(columns)
    words = {
        "name": table.name,
        "label": table.label,
        "category": table.category,
        "number": table.number,
        "value": rng.choice(table.values),
        "n": rng.randint(table.low, table.high),
        "k": rng.randint(2, 9),
    }
    question, statement = form
    return f"Table {table.name}({', '.join(columns)}). {question.format(**words)}", statement.format(**words)


def sql(rng: random.Random) -> tuple[list[Row], list[Row]]:
    train = [query(table, form, rng) for table in TABLES for form in (*QUERIES, *own_questions(table))]
    forms = rng.sample(QUERIES, 3 * len(HELD_OUT_TABLES))
    held_out = [
        query(table, form, rng)
        for at, table in enumerate(HELD_OUT_TABLES)
        for form in (*forms[3 * at : 3 * at + 3], *own_questions(table))
    ]
    return train, held_out


def write(path: Path, rows: Iterable[Row]) -> None:
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    for name, make in {"pirate": pirate, "extract-json": extract_json, "sql": sql}.items():
        train, held_out = make(random.Random(name))
        assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in held_out}
        write(DATA / f"{name}.jsonl", train)
        write(DATA / f"{name}.heldout.jsonl", held_out)
        print(f"{name}: {len(train)} training lines, {len(held_out)} held out")


if __name__ == "__main__":
    main()
