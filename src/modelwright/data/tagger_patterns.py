"""Sentence patterns for the tagger: with names in braces, and plain ones without. A new one is a line.

Written for this project. A backslash and an n inside a line are a line end.
"""

PATTERNS = tuple(
    line.replace("\\n", "\n")
    for line in """
Dear {first},
Dear {title} {last}, thank you for your letter of {date}.
Hi {first}, it was good to see you in {city} last week.
Hello, I am {person} and I would like to open an account.
Hey {first} can you send me the file again
I'm {first}. I live in {city}, {country}.
i am {first} and i live in {place}
My full name is {person} and I was born in {city}.
My daughter {first} goes to school in {city}.
My husband's name is {person}.
This is {person} calling about order {n}.
You can call me {first}.
They call him {first}, but his real name is {person}.
Please register {person} for the course.
Is {person} available on {date}?
Who is {person}?
Do you know where {first} is?
{first}, could you help me with this?
{first} said that {first} would be late.
"I don't believe it," said {person}.
"Come in," {first} whispered to {last}.
{person} was appointed {job} of {org} in {year}.
{person}, {job} at {org}, declined to comment.
{person}, who founded {org} in {year}, grew up in {city}.
{person} works as a {job} for {org}.
{person} joined {org} as {job} after leaving {org}.
{person} ({year}-{year}) was a {nat} writer.
{person} is a {nat} painter who lives and works in {place}.
{nat} singer {person} released a new album in {year}.
The {nat} government has signed an agreement with {country}.
The {nat} prime minister met {person} in {city}.
We ate at a {nat} restaurant in {city}.
He speaks with a {nat} accent.
I love {nat} food, especially the soup.
She is half {nat} and half {nat}.
Most {nat} people I know drink tea.
Our neighbours are {nat}.
The company employs {n} {nat} workers.
{org} announced on {date} that it will close its plant in {city}.
{org} has offices in {city}, {city} and {city}.
{org} and {org} will merge next year.
Shares of {org} fell by {n} percent.
I have been working at {org} for {n} years.
I used to work for {org} in {place}.
She left {org} to start {org} with {person}.
He studied law at {org}.
A spokesperson for {org} said that {n} people were affected.
According to {org}, sales in {country} rose.
We bought the licence from {org}.
Our client, {org}, asks for payment of invoice {n}.
This agreement is made between {org} and {org}.
This agreement is entered into by and between {org}, a company registered in {place}, and {person}.
The invoice was issued by {org}, {address}.
{org} is a startup from {city} that makes software for hospitals.
{org} is hiring a {job} in {place}.
The {org} team will get back to you.
My employer is {org}.
Employer: {org}
Company: {org}
Organization: {org}
Vendor: {org}
I flew from {city} to {city} on {date}.
We spent our holiday in {place}.
The weather in {place} is awful today.
He moved to {place} in {year}.
They travelled through {country}, {country} and {country}.
The train from {city} to {city} was late.
{city} is the capital of {country}.
{place} has a population of {n} million.
{place} is a beautiful region.
{country} won the match against {country}.
Where is {place}?
How do I get from {city} to {city}?
The river runs through {city} and {city}.
There was an earthquake near {city}, {country}.
The conference will be held in {city}, {place}.
Born in {city}, {country}, {person} moved to {place} as a child.
Country: {country}
City: {city}
Place of birth: {city}, {country}
Location: {place}
Nationality: {nat}
Hometown: {city}
I live at {address}.
I live on {address}.
My address is {address}.
My new address: {address}
Our office is located at {address}.
Please ship it to {address}.
Deliver the parcel to {person}, {address}.
Send the bill to {address}, please.
The accident happened at {address}.
The shop on {address} closes at six.
Address: {address}
Street: {address}
Billing address: {address}
Home address: {address}
Shipping address:\\n{address}
{person}\\n{address}
{person}\\n{org}\\n{address}
{org}\\n{address}
{city}\\n{country}
Name: {person}\\nAddress: {address}\\nPhone: {phone}
First name: {first}\\nLast name: {last}
Patient: {person}\\nAge: {n}
Patient {person}, {n} years old, was admitted on {date}.
Patient name: {person}, referred by {title} {last}.
{title} {last} examined the patient at {org}.
{title} {person} will see you now.
{title} {last} is the {job} of {org}.
I have an appointment with {title} {last} on {date}.
The nurse, {first}, took a blood sample.
Mother's maiden name: {last}
Emergency contact: {person} ({phone})
Account holder: {person}
Cardholder: {person}
Card holder name {person}, number {number}
Signed: {person}
Signed by {person} in {city} on {date}
Kind regards,\\n{person}
Best wishes,\\n{first}
Sincerely,\\n{person}\\n{job}\\n{org}
Thanks, {first}
Yours, {first} and {first}
From: {person} <{email}>
To: {person}
Cc: {person}, {person}
From: {email} ({person})
On {date}, {person} wrote:
Reported by {person} on {date}.
@{first} please look at this
Author: {person}
Written by {person}
Photo: {person}
Edited by {person} and {person}.
{person} et al. ({year}) found no effect.
As {last} ({year}) shows, prices rose.
see {last} and {last}, {year}
Copyright (c) {year} {person}
Copyright {year} {org}. All rights reserved.
{person}'s book was published in {year}.
{first}'s car broke down near {city}.
I met {first}'s sister at {org}.
{last}'s lawyer spoke to the press.
The film stars {person}, {person} and {person}.
The song was written by {person} and {person}.
It was directed by {person} and produced by {org}.
{person} sang it with {person} in {year}.
I am a big fan of {person}.
Have you read the new novel by {person}?
{person} beat {person} in the final.
{person} scored twice for {org}.
The court found {person} guilty of fraud.
Police arrested {person}, {n}, of {city}.
{person} v. {org}
{last} v. {last}
The defendant, {person}, lives in {city}.
Plaintiff {person} alleges that {org} broke the contract.
Witness {person} was not present.
Judge {last} dismissed the case.
President {last} visited {country} in {year}.
Senator {last} voted against the bill.
King {first} died in {year}.
Saint {first} was born in {city}.
The {last} family owns the hotel.
The {last}s are coming to dinner.
Mr and Mrs {last} live next door.
We invited {first}, {first}, {first} and {first}.
{first} and {first} got married in {city}.
Say hello to {first} for me.
Tell {first} that I called.
Ask {person} for the key.
Let's go, {first}!
Thank you {first}, that helped.
Oh, {first}! What have you done?
Why did {first} leave {city}?
Did you see {first}?
Has {person} paid the bill?
Please transfer {n} dollars from {person} to {person}.
The payment from {org} has not arrived.
Please add {person} to my account.
I want to change my name from {person} to {person}.
The policy is in the name of {person}.
Reservation for {person}, {n} guests, {date}.
Passenger: {last}/{first}
The booking is under {last}.
Can I speak to {title} {last}?
I spoke with {first} from {org} yesterday.
The manager at {org}, {person}, promised a refund.
I was in {org} on {date} and lost my bag.
{first}: Where are you?
{first}: I am at home.
{last}: Objection!
User: my name is {person}
Agent: Thank you, {first}. What is your address?
User: {address}
User: {person}
User: {city}
Q: Where were you born? A: {city}
What city are you in? {city}
Who is your employer? {org}
Where do you work? At {org}.
What is your last name? {last}
Where should we send it? {address}
1. {person} - {job}
2. {person}, {org}, {country}
- {person} ({org})
| {person} | {city} | {n} |
{person},{email},{phone},{city}
{last}, {first}; {city}; {year}
id={n} name={person} city={city}
name: {person}
customer={person}
Participants: {person}, {person}, {person}
Present: {first}, {first}, {title} {last}
Speaker: {person} ({org}, {country})
Contact {person} at {email} or {phone}.
For questions call {person} on {phone}.
You can reach {first} at {phone}.
Meet us at {address} on {date}.
Turn left at {address} and go on to {place}.
The party is at {first}'s place, {address}.
The taxi is waiting at {address}.
The {city} Marathon was won by {person} of {country}.
The Battle of {city} was fought in {year}.
The {city} office of {org} is closed.
The mayor of {city}, {person}, opened the bridge.
The embassy of {country} in {city} is closed.
Flights to {city} are cancelled.
Greetings from {place}!
Welcome to {city}!
I miss {city}.
{city}, {date} - {org} reported losses.
{city} ({org}) - The {nat} economy shrank.
Exports from {country} to {country} doubled.
Our {nat} partners at {org} agreed.
The {nat} company {org} bought {org} for {n} million.
{org} of {country} makes {n} cars a year.
{org}'s new phone sells well in {country}.
I bought it at {org}.
My bank is {org}.
I have a complaint about {org}.
I love {org}, their service is great.
{org} was founded by {person} in {city} in {year}.
{person} is the CEO of {org}.
{org}'s {job} {person} resigned on {date}.
Investors include {org}, {org} and {person}.
The study was funded by {org}.
Department of Physics, {org}, {city}, {country}
{person}, {org}, {city}
He graduated from {org} in {year}.
Students of {org} visited {city}.
The match between {org} and {org} ended in a draw.
{org} beat {org} {n}-{n}.
The band {org} played in {city}.
The rumours about {person} and {person} are false.
It is rumoured that {person} will leave {org}.
The works of {person} influenced {person}.
Some think that {person} wrote it; others say it was {person}.
{first} was {n} when {first} was born.
{first} is my best friend.
{first} lives in {place}.
{person} lives at {address}.
{person} lives in {city}.
{person} comes from {country}.
Hola, me llamo {person} y vivo en {city}.
Ich heiße {person} und wohne in {city}.
Sehr geehrte Frau {last}, vielen Dank.
Je m'appelle {person} et j'habite à {city}.
Bonjour {first}, comment vas-tu ?
Mi chiamo {person}.
Meu nome é {person}.
{org}\\n{address}\\n{city}\\n{country}
{org} engineer {person} presented the results.
{org} drummer {person} broke his arm.
{nat} swimmer {person} won two medals.
Comedian {person} and actor {person} were there.
I want to add {person} as a beneficiary.
Please name {person} as executor of the will.
Her novel, starring {person}, was filmed in {year}.
{person} is a fan of {person}.
I saw {first} play the guitar at {org}.
Please spell it {title} {last} on the card.
The account belongs to {person}, not to {person}.
Don't forget to call {first}.
It's {first}'s birthday.
We had to leave {first} at home.
Sing it again, {first}!
She bought a ticket to {city} by train.
The boat arrived at {city} last night.
My uncle came back from {place} by ship.
They sang a song called "Goodbye, {place}".
{org} Choir was founded in {year}.
The northern part of {country} is dry.
The road goes through northern {country} and southern {country}.
The {city} street where {person} lived is named {address}.
He lives on the left side of {address}.
Drivers must leave at {address}.
{address} is where we met.
The film is called after {address}, a road in {city}.
It happened at {address} in {city}.
{first} gave {first} the keys: {address}
I need a cab to {address}, please
{title} {person} is here.
Mr. {last} and Ms. {last} spoke.
{job}
{person}
{job}, {org}
{person}\n\n{job}\n\nPhone:\n{phone}\n\nE-mail:\n{email}\n\nAddress:\n{address}
{person}\n{job}\n{org}\n{address}\n{city}
{person}\n{org}\n{address}\nMobile: {phone}\nFax: {phone}
{city}\n{country} {zip}
{address}\n{city}\n{country}
Have you ever been to {country} before?
What time is it in {city}?
My grandmother {first} was from {country}.
I bet {first} knows the answer.
how is {first} doing?
{first} and I are going to {city}
""".strip().splitlines()
)

PLAIN = tuple(
    line.replace("\\n", "\n")
    for line in """
Where is my order?
I would like to cancel my subscription.
Please call me back.
What are your opening hours?
The quick brown fox jumps over the lazy dog.
Thank you for your help!
How much does it cost?
I have lost my card and need a new one.
Please send me the invoice for {date}.
My card number is {number}.
Call me at {phone}.
My email is {email}.
Meeting at {n} pm on Monday.
Your order {n} has been shipped.
Chapter {n}: The Beginning
The Internet is a network of networks.
Error {n}: File not found
See Figure {n} and Table {n}.
This Agreement shall be governed by the laws in force.
The Company shall pay the Purchase Price at Closing.
The Licensee may not assign this Agreement.
Section {n}. Definitions. In this Agreement the following terms apply.
WARNING: do not open the case.
NOTE: this function is deprecated since version {n}.
def main(): return None
class Parser: pass
import os, sys
TODO: fix this before the release
Return the number of items in the list.
Raises ValueError if the value is None.
True and False are constants; None is the null object.
I think that Love and Honesty matter most.
Happy New Year!
Merry Christmas and a happy new year to all of you.
Good morning, how can I help you?
On Tuesday we had soup, on Friday fish.
In March it rained a lot; in April it was dry.
No, I don't know.
Yes. Of course!
The patient was given {n} mg of aspirin.
The Bible and the Quran are holy books.
Windows and Linux are operating systems.
Python is a programming language.
The Moon goes round the Earth.
Mathematics, Physics and Chemistry are taught in the morning.
My password is not working.
Why was my payment declined?
Can I pay with a credit card?
What is the balance of my account?
I need to reset my PIN.
Account number: {number}
Order no. {n}
Total: {n} EUR
Date: {date}
Phone: {phone}
E-mail: {email}
Age: {n}
The Terms of Service apply.
Click Save, then choose Export from the File menu.
Frequently Asked Questions
Table of Contents
Introduction and Summary
The Second World War ended in {year}.
First, open the lid. Second, press the button.
He was the best player of the tournament.
She said that she would come later.
My brother is {n} years old.
He told me about it on {date}.
The house is old but nice.
It's raining cats and dogs.
What a day!
Dear Sir or Madam,
Dear customer,
To whom it may concern
Best regards
Kind regards
Yours sincerely,
Mr. and Mrs. are titles.
The CEO and the CFO resigned.
USB, HTTP and JSON are abbreviations.
The HTTP server returns status {n}.
Use the API with your key.
The GDP grew by {n} percent in {year}.
I read it in the Morning Post.
Capital letters do not make a name.
Is this a Joke?
This is VERY IMPORTANT.
PLEASE DO NOT REPLY TO THIS MESSAGE
ALL RIGHTS RESERVED
Don't worry, it's fine.
Don't do that again!
I can't, won't and shouldn't do it.
C'mon, let's go!
Cool, thanks. Nice one!
Wow, that's great news.
The patient is a {n} y/o woman.
My IBAN is on the form.
The visa was refused.
The Border Guard checks passports.
The Central Bank raised its rate.
The Treaty was signed in {year}.
The Orchestra and the Choir rehearse on Sunday.
Excuse me, Sir, is this seat taken?
User: hello
Bot: How can I help you?
Desk: {phone}
Mobile: {phone}
Fax: {phone}
Title: {job}
The street is closed.
St. and Rd. are short for street and road.
Founders, guardians and songwriters met.
Who was the songwriter?
The director and the producer quarrelled.
SSN: {number}
IP address blocked
My PIN is {n}.
Zip code: {n}
""".strip().splitlines()
)
