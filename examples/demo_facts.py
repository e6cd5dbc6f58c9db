"""Tables and question templates from which `demo_text.py` makes conversations."""

from __future__ import annotations

SUM_LIMIT = 30  # largest operand of additions and subtractions
COMPARE_LIMIT = 30  # largest number in comparisons
NEXT_LIMIT = 99  # largest number in "what comes after ...?"


def _table(text: str) -> dict[str, str]:
    """Read "key:value, key:value" into a dictionary."""
    return dict(pair.strip().split(":") for pair in text.split(","))


def _list(text: str, separator: str = ",") -> list[str]:
    """Read a separated list; templates are separated by "|" because they contain commas."""
    return [part.strip() for part in text.split(separator)]


def _parts(text: str) -> list[str]:
    """Read a list separated by "|" and keep its spaces."""
    return text.split("|")


NUMBER_WORDS = _list(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"
)
ORDINALS = _list(
    "first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth"
)
DAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTH_DAYS = _table(
    "January:31, February:28 or 29, March:31, April:30, May:31, June:30, July:31, August:31, "
    "September:30, October:31, November:30, December:31"
)
MONTHS = list(MONTH_DAYS)
CAPITALS = _table(
    "France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Austria:Vienna, "
    "Switzerland:Bern, Belgium:Brussels, Poland:Warsaw, Greece:Athens, Turkey:Ankara, "
    "Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen, Ireland:Dublin, "
    "England:London, Scotland:Edinburgh, Iceland:Reykjavik, Hungary:Budapest, Romania:Bucharest, "
    "Bulgaria:Sofia, Croatia:Zagreb, Serbia:Belgrade, Ukraine:Kyiv, Russia:Moscow, Japan:Tokyo, "
    "China:Beijing, India:New Delhi, Thailand:Bangkok, Vietnam:Hanoi, South Korea:Seoul, "
    "Nepal:Kathmandu, Iran:Tehran, Iraq:Baghdad, Egypt:Cairo, Morocco:Rabat, Kenya:Nairobi, "
    "Ghana:Accra, Nigeria:Abuja, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, "
    "Brazil:Brasilia, Argentina:Buenos Aires, Chile:Santiago, Colombia:Bogota, "
    "Australia:Canberra, New Zealand:Wellington, the United States:Washington, "
    "the Netherlands:Amsterdam, the Czech Republic:Prague"
)
# Only asked for by country: the capital already leads to another name of it.
OTHER_NAMES = _table("the USA:Washington, the United Kingdom:London, Great Britain:London")
_PAIRS = _table(
    "hot:cold, big:small, tall:short, fast:slow, happy:sad, light:dark, old:young, good:bad, "
    "hard:soft, high:low, wet:dry, open:closed, full:empty, rich:poor, strong:weak, early:late, "
    "up:down, left:right, day:night, near:far, loud:quiet, clean:dirty, thick:thin, deep:shallow, "
    "easy:difficult, first:last, inside:outside, always:never, love:hate, true:false, "
    "wide:narrow, sweet:sour, begin:end, buy:sell, push:pull, yes:no, win:lose, black:white, "
    "heavy:light, new:old, long:short, cheap:expensive, brave:afraid, sharp:blunt"
)
# Both directions, except where a word has two opposites: the first one named stays.
OPPOSITES = {**{b: a for a, b in reversed(_PAIRS.items())}, **_PAIRS}
OPPOSITES.update(light="dark", old="young", short="tall")
PLURALS = _table(
    "cat:cats, dog:dogs, house:houses, tree:trees, car:cars, book:books, apple:apples, "
    "table:tables, chair:chairs, bird:birds, flower:flowers, river:rivers, friend:friends, "
    "window:windows, garden:gardens, horse:horses, cow:cows, pen:pens, cup:cups, shoe:shoes, "
    "box:boxes, bus:buses, glass:glasses, fox:foxes, dish:dishes, church:churches, watch:watches, "
    "brush:brushes, class:classes, potato:potatoes, tomato:tomatoes, hero:heroes, baby:babies, "
    "city:cities, story:stories, country:countries, family:families, lady:ladies, party:parties, "
    "boy:boys, key:keys, toy:toys, day:days, leaf:leaves, knife:knives, wolf:wolves, life:lives, "
    "wife:wives, shelf:shelves, child:children, man:men, woman:women, mouse:mice, tooth:teeth, "
    "foot:feet, goose:geese, sheep:sheep, fish:fish, person:people"
)
COLOURS = _table(
    "a banana:yellow, a lemon:yellow, the sun:yellow, a strawberry:red, a tomato:red, blood:red, "
    "a cherry:red, a fire engine:red, the sky:blue, the sea:blue, a blueberry:blue, grass:green, "
    "a leaf:green, a cucumber:green, a frog:green, broccoli:green, snow:white, milk:white, "
    "salt:white, a swan:white, sugar:white, coal:black, a raven:black, the night:black, "
    "a carrot:orange, a pumpkin:orange, an orange:orange, chocolate:brown, wood:brown, "
    "coffee:brown, an elephant:grey, a mouse:grey, a flamingo:pink, a pig:pink, a plum:purple, "
    "lavender:purple"
)
_THINGS = [thing.split()[-1] for thing in COLOURS]
SPELLING_WORDS = sorted(
    {w for w in (*PLURALS, *OPPOSITES, *COLOURS.values(), *_THINGS) if len(w) > 2}
)
NAMES = _list(
    "Anna, Ben, Clara, David, Emma, Felix, Greta, Hugo, Ida, Jonas, Kim, Laura, Max, Nina, Oscar, "
    "Paul, Rosa, Sam, Tom, Uma, Vera, Will, Zoe, Alice, Bob, Carol, Dan, Eve, Frank, Grace, John, "
    "Jane, Mary, Peter, Lucy, Mark, Sara, Alex, Maria, Ali, Ravi, Mei, Yuki, Omar, Lena, Noah"
)
SYLLABLES = _list(
    "la, mi, ro, ka, ni, sa, to, ma, li, na, ra, jo, be, da, el, an, or, vi, te, ko, shi, ya, mar, "
    "len, tin, bo, lu, ri, sol, fen, gar, hu, pe, zi, wen, do, ce, ul, is, em"
)
TOPICS = _list(
    "quantum physics, love, the moon, football, history, music, the stock market, philosophy, "
    "dinosaurs, the ocean, politics, cooking, chess, computers, a pizza, Shakespeare, the weather, "
    "art, medicine, bread, robots, space travel, gardening, bitcoin, mathematics, the internet, "
    "a dragon, poetry, Python, my car, the news, tennis, Napoleon, Mozart, biology, a spaceship, "
    "the universe, religion, economics, movies, a guitar, climate change, a recipe, my homework"
)
SYSTEM_MESSAGES = _list(
    "You are a helpful assistant.|You are the ScaleLLM demo model.|Answer briefly.|Be polite.|"
    "You are a friendly teacher.|You answer questions of children.|Keep your answers short.|"
    "You are a helpful assistant. Answer in one sentence.|You are a careful assistant.|"
    "You are a chat bot on a web site. Be kind and short.|Answer the question of the user.|"
    "You are an assistant for simple questions. Say so when you do not know something.",
    "|",
)

UNKNOWN = "Sorry, I do not know that. Ask me what I can do."
BIG_SUM = f"I only know small sums: plus and minus up to {SUM_LIMIT}, times up to 10."
NO_NAME = "I do not know your name yet."

PREFIXES = _list(
    "Hey, |Please: |Tell me: |Ok, |Question: |Quick question: |So, |Now, |Well, |Hello, |Hi, |"
    "One more: |Next: |And now: |Good, |Hmm, |I have a question: |Please tell me: |Thanks, ",
    "|",
)
PREFIXES = [prefix + " " for prefix in PREFIXES]
SUFFIXES = [" please?", ", please.", " please", "??", "!", " ?", ", thanks", " now?", "..."]

TEMPLATES: dict[str, list[str]] = {
    kind: _list(text, "|")
    for kind, text in {
        "addition": "What is {a} + {b}?|What is {a} plus {b}?|What's {a} + {b}?|{a} + {b}|"
        "{a}+{b}|{a}+{b}=|{a} + {b} =|{a} + {b} = ?|{a} plus {b}|How much is {a} + {b}?|"
        "How much is {a} plus {b}?|Add {a} and {b}.|Calculate {a} + {b}.|Compute {a}+{b}.|"
        "Can you add {a} and {b}?|What is the sum of {a} and {b}?|Sum of {a} and {b}?|"
        "What does {a} + {b} make?|What is {a} and {b} together?|{a} and {b} makes?|"
        "I have {a} apples and get {b} more. How many do I have?|Can you compute {a} + {b}?|"
        "Anna has {a} books and buys {b} more. How many books does she have?|Solve {a} + {b}.",
        "subtraction": "What is {a} - {b}?|What is {a} minus {b}?|What's {a} - {b}?|{a} - {b}|"
        "{a}-{b}|{a}-{b}=|{a} - {b} =|{a} - {b} = ?|{a} minus {b}|How much is {a} - {b}?|"
        "How much is {a} minus {b}?|Calculate {a} - {b}.|Compute {a}-{b}.|Solve {a} - {b}.|"
        "What do you get for {a} minus {b}?|What does {a} - {b} make?|{a} take away {b}?|"
        "Can you compute {a} - {b}?|{a} less {b}?|What is {a} take away {b}?",
        "multiplication": "What is {a} times {b}?|What is {a} x {b}?|{a} * {b}|{a}*{b}|{a} x {b}|"
        "What is {a} * {b}?|{a} times {b}|How much is {a} times {b}?|Multiply {a} by {b}.|"
        "Calculate {a} * {b}.|What is the product of {a} and {b}?|Compute {a} x {b}.|"
        "{a} multiplied by {b}?|What is {a} multiplied by {b}?|What's {a} times {b}?",
        "comparison_larger": "Which is larger, {a} or {b}?|Which is bigger, {a} or {b}?|"
        "Which number is larger: {a} or {b}?|What is more, {a} or {b}?|Which is greater: {a} or "
        "{b}?|{a} or {b}, which is larger?|What is the larger number, {a} or {b}?",
        "comparison_smaller": "Which is smaller, {a} or {b}?|Which number is smaller: {a} or {b}?|"
        "What is less, {a} or {b}?|{a} or {b}, which is smaller?|Which is less: {a} or {b}?|"
        "What is the smaller number, {a} or {b}?",
        "comparison_is_larger": "Is {a} larger than {b}?|Is {a} bigger than {b}?|"
        "Is {a} greater than {b}?|Is {a} more than {b}?|Is the number {a} larger than {b}?",
        "comparison_is_smaller": "Is {a} smaller than {b}?|Is {a} less than {b}?|"
        "Is the number {a} smaller than {b}?|Is {a} lower than {b}?",
        "counting_up": "Count from {a} to {b}.|Count up from {a} to {b}.|Can you count from {a} "
        "to {b}?|List the numbers from {a} to {b}.|Numbers from {a} to {b}?|Say the numbers from "
        "{a} to {b}.|Write the numbers {a} to {b}.|Count {a} to {b}.|Start at {a} and count to "
        "{b}.",
        "counting_up_to": "Count to {b}.|Can you count to {b}?|Count up to {b}.",
        "counting_down": "Count down from {a} to {b}.|Count backwards from {a} to {b}.|Count from "
        "{a} down to {b}.|Can you count down from {a} to {b}?|Count from {a} to {b}.|Numbers from "
        "{a} down to {b}?|Start at {a} and count down to {b}.",
        "counting_next": "What comes {word} {a}?|Which number comes {word} {a}?|What number is "
        "{word} {a}?|What is the number {word} {a}?|Which number is just {word} {a}?|The number "
        "{word} {a}?",
        "capitals": "What is the capital of {country}?|What's the capital of {country}?|"
        "Capital of {country}?|The capital of {country}?|Which city is the capital of {country}?|"
        "Tell me the capital of {country}.|Name the capital of {country}.|What is the capital "
        "city of {country}?|Do you know the capital of {country}?|Can you tell me the capital of "
        "{country}?|What city is the capital of {country}?|I need the capital of {country}.|"
        "{country} has which capital?|What capital does {country} have?|Can you name the capital "
        "city of {country}?|Please name the capital of {country}.",
        "capitals_reverse": "Which country has the capital {capital}?|{capital} is the capital of "
        "which country?|What country is {capital} the capital of?|{capital} is the capital of "
        "what?|Of which country is {capital} the capital?|What is {capital} the capital of?",
        "calendar_one": "What {unit} comes {word} {name}?|Which {unit} comes {word} {name}?|"
        "What is the {unit} {word} {name}?|Which {unit} is {word} {name}?|What comes {word} "
        "{name}?|The {unit} {word} {name}?|Tell me the {unit} {word} {name}.|Name the {unit} "
        "{word} {name}.|What {unit} is it {word} {name}?|What's {word} {name}?|Do you know the "
        "{unit} {word} {name}?|Can you tell me which {unit} comes {word} {name}?",
        "calendar_two": "What {unit} is two {unit}s {word} {name}?|Which {unit} comes two {unit}s "
        "{word} {name}?|Two {unit}s {word} {name}?|What is two {unit}s {word} {name}?|Name the "
        "{unit} two {unit}s {word} {name}.|Tell me the {unit} two {unit}s {word} {name}.|Which "
        "{unit} is 2 {unit}s {word} {name}?",
        "calendar_order": "What is the {order} {unit} of the {where}?|Which is the {order} {unit} "
        "of the {where}?|Name the {order} {unit} of the {where}.|The {order} {unit} of the "
        "{where}?|Tell me the {order} {unit} of the {where}.|What is the {order} {unit}?",
        "month_length": "How many days does {name} have?|How many days are in {name}?|How long is "
        "{name}?|How many days are there in {name}?|What is the number of days in {name}?|How "
        "many days has {name}?",
        "opposites": "What is the opposite of {word}?|What's the opposite of {word}?|Opposite of "
        "{word}?|The opposite of {word}?|Tell me the opposite of {word}.|Name the opposite of "
        "{word}.|Give me the opposite of {word}.|What is the contrary of {word}?|Which word is "
        "the opposite of {word}?|What word means the opposite of {word}?|Do you know the opposite "
        "of {word}?|Can you tell me the opposite of {word}?",
        "plurals": "What is the plural of {word}?|What's the plural of {word}?|Plural of {word}?|"
        "The plural of {word}?|Tell me the plural of {word}.|Give me the plural of {word}.|One "
        "{word}, two what?|What is the plural form of {word}?|How do you write the plural of "
        "{word}?|Make {word} plural.|Do you know the plural of {word}?|Can you tell me the plural "
        "of {word}?|What do you call more than one {word}?",
        "colours": "What {colour} is {thing}?|Which {colour} is {thing}?|What is the {colour} of "
        "{thing}?|What's the {colour} of {thing}?|The {colour} of {thing}?|Tell me the {colour} of "
        "{thing}.|Which {colour} does {thing} have?|What {colour} does {thing} have?|Do you know "
        "the {colour} of {thing}?|{colour} of {thing}?|Can you tell me the {colour} of {thing}?",
        "letters_spell": "Spell {word}.|Spell the word {word}.|How do you spell {word}?|Can you "
        "spell {word}?|How is {word} spelled?|Please spell {word} for me.|Spell out {word}.|What "
        "is the spelling of {word}?|How do I spell {word}?",
        "letters_length": "How many letters are in {word}?|How many letters does {word} have?|"
        "How many letters are in the word {word}?|How long is the word {word}?|Count the letters "
        "of {word}.|Number of letters in {word}?|How many letters has the word {word}?",
        "letters_first": "What is the first letter of {word}?|Which letter does {word} start "
        "with?|First letter of {word}?|What letter does {word} begin with?|What's the first letter "
        "in {word}?|Tell me the first letter of {word}.",
        "letters_last": "What is the last letter of {word}?|Which letter does {word} end with?|"
        "Last letter of {word}?|What letter does {word} end with?|What's the last letter in "
        "{word}?|Tell me the last letter of {word}.",
        "letter_next": "What letter comes {word} {letter}?|Which letter comes {word} {letter}?|"
        "What is the letter {word} {letter}?|Which letter is {word} {letter}?|The letter {word} "
        "{letter}?|In the alphabet, what comes {word} {letter}?",
        "names": "My name is {name}.|I am {name}.|I'm {name}.|Hi, I am {name}.|Call me {name}.|"
        "Hello, my name is {name}.|You can call me {name}.|Hello, I'm {name}.|My name's {name}.|"
        "People call me {name}.|This is {name}.",
        "followup": "And {word}?|And of {word}?|What about {word}?|How about {word}?|And for "
        "{word}?|And what about {word}?|Now {word}?|The same for {word}?|And {word}, please?",
        "unknown": "Write a poem about {topic}.|Tell me about {topic}.|Explain {topic}.|What is "
        "{topic}?|Who invented {topic}?|What do you think about {topic}?|Do you like {topic}?|"
        "How does {topic} work?|Why is {topic} important?|Write a story about {topic}.|"
        "Write code about {topic}.|Who is {name}?|Where is {place}?|How far is {place} from "
        "here?|What is the weather in {place}?|How many people live in {place}?|Tell me a joke "
        "about {topic}.|Tell me a joke.|How old is {name}?|Who won the match against {place}?|"
        "What is {a} divided by {b}?|{a} / {b}|What is the square root of {a}?|What time is it "
        "in {place}?|Translate {topic} into German.|What is the meaning of {topic}?|Compare "
        "{topic} and {other}.|What is better, {topic} or {other}?|Is {topic} better than {other}?|"
        "Give me advice about {topic}.|How can I learn {topic}?|Summarize {topic}.|Where can I "
        "buy {topic}?|When did {topic} begin?|What is the best book about {topic}?|Can you help me "
        "with {topic}?|I want to talk about {topic}.|Show me a picture of {topic}.|Sing a song "
        "about {topic}.|Book a flight to {place}.|Can I travel to {place} with {name}?|Who wrote "
        "{topic}?|I like {topic}.|Should I learn {topic} or {other}?|"
        "What day is it today?|What day is today?|What is the date of today?|How many legs does "
        "{name} have?|What is {a} + {b} + {a}?|{a} + {b} + {b}|Write a letter to {name}.|How are "
        "{topic} and {other} related?|Who is the president of {place}?|Do you speak German?|Do you "
        "know {name}?",
    }.items()
}

MEMORY_OPENINGS = _list(
    "What is my name|What's my name|Do you know my name|Do you remember my name|Tell me my name|"
    "Can you tell me my name|Who am I|Say my name|Do you still know my name|What am I called|"
    "How am I called|What did I say my name is|Can you say my name|And what is my name",
    "|",
)
MEMORY_ENDINGS = ["?", " now?", " again?", ", please?", " by the way?", ", my friend?", " then?"]

# Per category: (openings, endings, answer); endings keep their leading space.
TALK: dict[str, list[tuple[list[str], list[str], str]]] = {
    "greetings": [
        (
            _parts(
                "Hello|Hi|Hey|Good morning|Good evening|Good afternoon|Hi there|Hello there|"
                "Hey there|Greetings|Good day|Howdy|Hello hello|Welcome|Hi hi|Morning"
            ),
            _parts(
                "!|.|| friend!| demo model!| ScaleLLM!| model| again!| you!| my friend!|"
                " everyone!|, nice to meet you!| little model!| bot"
            ),
            "Hello! How can I help you?",
        ),
        (
            _parts(
                "How are you|How are you doing|How do you do|How is it going|"
                "Hello, how are you|Hi, how are you|Hey, how are you|Are you well|"
                "How do you feel"
            ),
            _parts("?| today?| this morning?|, friend?| now?| my friend?|, model?"),
            "I am fine, thank you. How can I help you?",
        ),
        (
            _parts("Goodbye|Bye|Bye bye|See you|Good night|See you later|Farewell|Have a nice day"),
            _parts("!|.| friend!| for now!| my friend!| then!|, model!"),
            "Goodbye! Come back soon.",
        ),
    ],
    "identity": [
        (
            _parts(
                "Who are you|What are you|What is your name|What's your name|Your name|"
                "Are you a bot|Who am I talking to|Tell me who you are|Introduce yourself|"
                "Tell me about yourself|What model are you|Which model is this|"
                "Are you ChatGPT|Are you a language model|Do you have a name|Are you human|"
                "What are you called"
            ),
            _parts("?|.| exactly?| really?|, please?|, friend?| actually?| then?"),
            "I am the ScaleLLM demo model, a tiny language model.",
        ),
        (
            _parts(
                "What can you do|What do you know|What can I ask you|How can you help me|Help|"
                "What can you help me with|What are you good at|What should I ask you|Help me|"
                "What questions can you answer|What are your skills|What can I ask"
            ),
            _parts("?| now?| exactly?|, please?| then?|, friend?| really?"),
            "I can do small sums, count, and answer questions about capitals, days, "
            "months, opposites, plurals, colours and spelling.",
        ),
    ],
    "thanks": [
        (
            _parts(
                "Thanks|Thank you|Thank you very much|Many thanks|Thanks a lot|Great|Thx|"
                "Well done|Thank you so much|Cool, thanks|Great, thank you|Perfect, thanks|"
                "Good answer|Very good|Nice|Good job|Ok, thanks"
            ),
            _parts(
                "!|.| friend!| for the help!| model!| again!|, you are kind!|, that was good!|"
                ", that helps!| for that!| my friend!"
            ),
            "You are welcome!",
        ),
    ],
}
